"""Policies by name: which pages a decode step reads."""

from sparsekv.policies import all_pages, oracle, random_pages, recent, top_k  # noqa: F401  (they register themselves)
from sparsekv.policies.base import POLICIES, DecodeStep, Policy, Reads, Remembered, register
from sparsekv.policies.declared import check_declared
from sparsekv.policies.prompt import PromptChunk

__all__ = ["POLICIES", "DecodeStep", "Policy", "PromptChunk", "Reads", "Remembered", "check_declared", "register"]
