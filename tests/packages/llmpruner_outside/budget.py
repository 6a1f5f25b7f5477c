"""Parameters of matrices alone: what a quantiser shrinks."""

from llmpruner import Budget, SizeModel, WeightCost


class MatrixParameters(Budget):
    name = "matrices"
    summary = "parameters of weight matrices, without norms and biases"
    from_shapes = True

    def cost(self, subject):
        graph = subject.graph
        names = {n: 1 for n, shape in graph.shapes.items() if len(shape) > 1 and n not in graph.ties}
        return WeightCost(SizeModel(graph, subject.groups), names, "matrix parameters")
