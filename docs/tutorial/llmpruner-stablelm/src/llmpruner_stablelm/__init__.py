from llmpruner import ModelFamily, hookimpl


class StableLmFamily(ModelFamily):
    name = "stablelm"
    model_types = ("stablelm",)


@hookimpl
def llmpruner_model_families():
    return [StableLmFamily]
