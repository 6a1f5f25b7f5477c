"""Discovery: finding the coupled groups of any decoder by tracing it without weights, and proving them.

configuration ─trace→ graph of operators ─propagate→ tied indices ─units→ unit sets ─groups→ `CouplingGraph`

- `trace`: the model is built on the meta device, with one layer of every kind, and exported as ATen operators.
- `propagate`, `operators_math`, `operators_shape`: every index of every parameter axis gets an identity (`ids`); a rule
  for each operator ties the identities that can only be removed together, and blocks those that can't be removed.
- `groups`: connected identities become units, their kind (mlp, attention, …) follows from their marks, and the
  groups of a traced layer are repeated for all layers that it stands for.

A trace shows neither head counts stored in attributes nor mistakes. So the `oracle` takes a small random model of the
same architecture (`tiny`, `shrink`), cuts units, and compares its logits with those of the model in which the units are
silenced; `follow` finds the attributes that must change with a cut; `verify` gives a verdict for each kind of unit.
"""
