"""Discovery: finding the coupled groups of any decoder by tracing it without weights, and proving them.

configuration ─trace→ graph of operators ─propagate→ tied indices ─groups→ `CouplingGraph`

A trace shows neither head counts stored in attributes nor mistakes. So the `oracle` takes a small random model of the
same architecture (`tiny`), cuts units, and compares its logits with those of the model in which the units are silenced;
`follow` finds the attributes that must change with a cut; `verify` gives a verdict for each kind of unit; `cut` cuts a
model and updates those attributes.
"""
