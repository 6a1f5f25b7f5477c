"""``llmpruner generate``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from ..errors import DataError
from ..loading.options import LoadOptions
from .console import out, print_json
from .options import Json, Models, Seed, load_options, open_model, spliced


def add_commands(app: typer.Typer) -> None:
    app.command()(generate)


@spliced(options=load_options)
def generate(
    ctx: typer.Context,
    models: Models,
    options: LoadOptions,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to continue, or to answer with --chat.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat format.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; above 0 samples.")] = 0.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Let models continue one prompt, one after the other."""
    from ..families.chat import Prompt, chat_prompt
    from ..models import generation

    answers: dict[str, str] = {}
    for model in models:
        loaded = open_model(ctx, model, options)
        if loaded.tokenizer is None:
            raise DataError(f"model '{model}' brings no tokenizer, so it cannot read a prompt")
        asked = chat_prompt(loaded.family, loaded.tokenizer, prompt) if chat else Prompt(prompt, False)
        answers[model] = generation.generate(
            loaded.model, loaded.tokenizer, asked.text, add_special_tokens=not asked.has_special_tokens,
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        )  # fmt: skip
    if as_json:
        print_json({"prompt": prompt, "answers": answers})
        return
    for model, answer in answers.items():
        out.print(f"[bold cyan]{escape(model)}[/]")
        out.print(escape(answer), highlight=False)
