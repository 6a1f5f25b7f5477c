from llmpruner import ModelFamily, hookimpl


class StableLmFamily(ModelFamily):
    name = "stablelm"
    summary = "StableLM of Stability AI"
    model_types = ("stablelm",)


@hookimpl
def llmpruner_model_families():
    return [StableLmFamily]
