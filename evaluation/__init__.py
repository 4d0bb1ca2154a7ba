"""Measuring sparsekv: a testbed model, questions over long contexts, accuracy and speed."""
