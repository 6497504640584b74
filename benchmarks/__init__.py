"""Benchmarks of psoft-export against PEFT; `docs/benchmarks.md` says how to run and read them."""
