"""Which key blocks each query block keeps: one file per rule, each returning a BlockPlan."""
