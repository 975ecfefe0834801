// What the emulation of tiles says of mistakes, one by its number, and whether its products are those of the manual ("products"). Built by
// test_cpu_builds.py.
#include "tiles.h"

#include <thread>

static char memory[8][1024];

static TileConfig sizes(int rows, int row_bytes) {
  TileConfig c = TileConfig::full();
  for (int t = 0; t < 8; t++) { c.rows[t] = (uint8_t)rows; c.row_bytes[t] = (uint16_t)row_bytes; }
  return c;
}

static void make_mistake(int number) {
  TileConfig c = TileConfig::full();
  switch (number) {
    case 0: return tile_product<0, 1, 2>();
    case 1: return tile_load<0>(memory[0]);
    case 2: return tile_store<0>(memory[0]);
    case 3: return tile_zero<0>();
    case 4: load_config(c), release_tiles(); return tile_zero<0>();
    case 5: c.rows[3] = 17; return load_config(c);
    case 6: c.row_bytes[3] = 68; return load_config(c);
    case 7: c.rows[3] = 0; return load_config(c);
    case 8: c.palette = 2; return load_config(c);
    case 9: c.rows[8] = c.row_bytes[8] = 8; return load_config(c);
    case 10: c.rows[3] = 0, c.row_bytes[3] = 0, load_config(c); return tile_load<3>(memory[0]);
    case 11: load_config(c); return tile_product<0, 1, 1>();
    case 12: c.rows[1] = 8, load_config(c); return tile_product<0, 1, 2>();
    case 13: c.row_bytes[1] = 32, load_config(c); return tile_product<0, 1, 2>();
    case 14: load_config(sizes(16, 62)); return tile_product<0, 1, 2>();
    case 15: std::thread([] { load_config(TileConfig::full()); }).join(); return;
  }
}

static float widened(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static float flushed(float x) { return std::fabs(x) < FLT_MIN ? 0.f * x : x; }

// One element at a time, from the manual's text.
static float element(float c, const uint16_t* row, const uint16_t (*b)[32], int column, int pairs) {
  float sums[2] = {};
  for (int k = 0; k < pairs; k++) for (int i = 0; i < 2; i++)
    sums[i] = flushed(std::fma(flushed(widened(row[2 * k + i])), flushed(widened(b[k][2 * column + i])), sums[i]));
  return flushed(flushed(c) + flushed(sums[0] + sums[1]));
}

// Random bits: denormals, numbers of every size, no NaN and no infinity.
static int compare_products(int rows, int columns, int pairs) {
  alignas(64) uint16_t a[16][32], b[16][32];
  alignas(64) float c[16][16], out[16][16];
  for (auto& row : a) for (auto& x : row) x = (uint16_t)rand() & 0xbfff;
  for (auto& row : b) for (auto& x : row) x = (uint16_t)rand() & 0xbfff;
  for (auto& row : c) for (auto& x : row) x = widened((uint16_t)rand() & 0xbfff);
  TileConfig config = TileConfig::full();
  config.rows[0] = config.rows[1] = (uint8_t)rows, config.row_bytes[0] = config.row_bytes[2] = (uint16_t)(4 * columns);
  config.row_bytes[1] = (uint16_t)(4 * pairs), config.rows[2] = (uint8_t)pairs;
  load_config(config);
  memset(out, 0, sizeof out);
  tile_load<0>(c), tile_load<1>(a), tile_load<2>(b);
  tile_product<0, 1, 2>();
  tile_store<0>(out);
  release_tiles();
  int bad = 0;
  for (int m = 0; m < 16; m++) for (int n = 0; n < 16; n++) {
    const float expected = m < rows && n < columns ? element(c[m][n], a[m], b, n, pairs) : 0;
    bad += memcmp(&expected, &out[m][n], 4) != 0 && !(expected == 0 && out[m][n] == 0);
  }
  return bad;
}

int main(int, char** arguments) {
  if (strcmp(arguments[1], "products")) {
    make_mistake(atoi(arguments[1]));
    return 0;
  }
  int bad = 0;
  for (int repeat = 0; repeat < 20; repeat++) for (int rows : {1, 7, 16}) for (int columns : {1, 9, 16}) for (int pairs : {1, 5, 16})
    bad += compare_products(rows, columns, pairs);
  printf("%d elements differ\n", bad);
  return bad != 0;
}
