"""The search for the fastest setting that keeps a wanted quality. It knows an objective, and no pipeline."""
