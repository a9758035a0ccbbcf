//! Benchmarks of farpage against its baselines.
