"""EleutherAI's lm-evaluation-harness with sparse decoding: `sparsekv lm-eval` (extra `eval`).

Importing this imports nothing of lm_eval; `model` does.
"""
