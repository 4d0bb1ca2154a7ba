"""Measuring sparsekv: a testbed model, questions over long contexts, speed; later the accuracy harness."""
