"""Prune, recover and evaluate a real model with the public API alone."""

import llmpruner

dense = llmpruner.evaluate("demo", settings={"perplexity": {"tokens": 2048}})
plan = llmpruner.plan("demo", ratio=0.2, samples=16, length=128)
pruned = llmpruner.prune("demo", plan=plan, output="pruned")
recovered = llmpruner.recover("pruned", data="instructions.jsonl", max_steps=4, batch_size=4, output="recovered")
after = llmpruner.evaluate(["pruned", "recovered"], settings={"perplexity": {"tokens": 2048}})
for result in (dense, *after):
    print(f"{result.name}: {result.parameters:,} parameters, perplexity {result.perplexity:.2f}")
