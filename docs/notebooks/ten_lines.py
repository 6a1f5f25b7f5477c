"""Prune, recover and evaluate a real model with the public API alone."""

import llmpruner

dense = llmpruner.evaluate("demo", tokens=4096)
plan = llmpruner.plan("demo", ratio=0.2, samples=16, length=256)
pruned = llmpruner.prune("demo", plan=plan, output="pruned")
recovered = llmpruner.recover("pruned", data="instructions.jsonl", max_steps=8, batch_size=8, output="recovered")
after = llmpruner.evaluate(["pruned", "recovered"], tokens=4096)
for result in (*dense, *after):
    assert result.perplexity is not None
    print(f"{result.name}: perplexity {result.perplexity.perplexity:.2f}")
