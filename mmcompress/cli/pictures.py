"""The commands `run` and `show`: a method on a picture of yours."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import mmcompress
from mmcompress.cli._shared import MODEL_HELP, load_model, parse_keep
from mmcompress.errors import InputError, SpecError, UnsupportedError
from mmcompress.evals.micro import DEFAULT_MODEL

if typing.TYPE_CHECKING:
    from PIL.Image import Image

    from mmcompress.spec import CompressionConfig


__KEEP_HELP = "What stays per image: a fraction such as 0.25, or a token count such as 36 (1 is one token, 1.0 all)."


def run(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    image: Annotated[list[Path], typer.Option(help="A picture; may be given several times.")],
    question: Annotated[str, typer.Option(help="What to ask about it.")],
    method: Annotated[str, typer.Option(help="A method or spec, as in 'todre(objective=k-center)'.")],
    keep: Annotated[str | None, typer.Option(help=__KEEP_HELP)] = None,
    positions: Annotated[
        str | None, typer.Option(help="How kept tokens are numbered: renumber or original (default: by model).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1)] = 64,
) -> None:
    """Ask a model one question with and without compression, and show what it saved.

    Try:

      mmcompress run micro-llava --image scene.png --question "what color is the star ?" --method todre --keep 0.1
      mmcompress run llava-hf/llava-1.5-7b-hf --image a.jpg --image b.jpg --question "What differs?" \
--method vtc-cls --keep 128
    """
    from mmcompress.evals.runner import UNPRUNED, open_image
    from mmcompress.spec import CompressionConfig

    config = _config(method, keep, positions)
    pictures = [open_image(path) for path in image]
    loaded, processor = load_model(model)
    inputs = _prompt(loaded, processor, pictures, question)
    unpruned = CompressionConfig.create(UNPRUNED[0], keep=UNPRUNED[1])
    console = Console()
    mmcompress.wrap(loaded, config).unwrap()  # whatever is impossible shows before the work begins
    columns = []
    for label, wanted in (("unpruned", unpruned), (str(config), config)):
        with mmcompress.wrap(loaded, wanted) as handle:
            loaded.generate(**inputs, max_new_tokens=1, do_sample=False)  # the first pass of each kind is slow
            output = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            stats = handle.stats
        assert stats is not None  # there is at least one picture
        answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        console.print(f"[bold]{escape(label)}[/]\n{escape(answer.strip())}\n", highlight=False)
        columns.append(
            {
                "visual tokens": f"{stats.kept} of {stats.tokens}",
                "prefill GFLOP": f"{stats.prefill_flops / 1e9:.3g}",
                "KV cache MB": f"{stats.kv_bytes / 1e6:.3g}",
                **{f"{stage} ms": f"{1000 * seconds:.1f}" for stage, seconds in vars(stats.seconds).items()},
            }
        )
    table = Table("", "unpruned", escape(str(config)))
    for quantity in columns[0]:
        table.add_row(quantity, *(column[quantity] for column in columns))
    console.print(table)


def show(
    image: Annotated[Path, typer.Argument(help="A picture.", metavar="IMAGE")],
    method: Annotated[str, typer.Option(help="Methods or specs, separated by commas.")],
    keep: Annotated[str | None, typer.Option(help=__KEEP_HELP)] = None,
    out: Annotated[Path, typer.Option(help="The picture to write; its ending says the format.")] = Path("kept.png"),
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = DEFAULT_MODEL,
) -> None:
    """Draw the tokens that methods keep over a picture, side by side.

    Try:

      mmcompress show scene.png --method random,pool,todre --keep 0.1
      mmcompress show photo.jpg --method "vtc-cls,todre(objective=k-center)" --keep 128 --out kept.jpg \
--model llava-hf/llava-1.5-7b-hf
    """
    import torch
    from PIL import Image

    from mmcompress.evals.overlay import original, overlay, side_by_side
    from mmcompress.evals.runner import open_image
    from mmcompress.evals.samples import as_seen
    from mmcompress.spec import split_specs

    configs = [_config(part, keep) for part in split_specs(method)]
    if not out.parent.is_dir():
        raise SpecError(f"--out {out}: the folder {out.parent} does not exist.")
    if Image.registered_extensions().get(out.suffix.lower()) not in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        raise SpecError(f"--out {out}: no picture format ends in {out.suffix!r}; use .png, .jpg or .webp.")
    picture = open_image(image)
    loaded, processor = load_model(model)
    picture = as_seen(loaded, processor, picture)
    inputs = _prompt(loaded, processor, [picture], "What is in the picture ?")
    panels = [original(picture)]
    for config in configs:
        with mmcompress.wrap(loaded, config) as handle, torch.inference_mode():
            loaded(**inputs)
            traces = handle.trace
        if len(traces) != 1:
            raise UnsupportedError(f"{type(loaded).__name__} makes {len(traces)} items of a picture; one can be drawn.")
        label = str(dataclasses.replace(config.methods[0], keep=None))
        panels.append(overlay(picture, traces[0].grids, traces[0].selection, label))
    side_by_side(panels).save(out)
    Console().print(f"wrote {out}", highlight=False)


def _config(method: str, keep: str | None, positions: str | None = None) -> CompressionConfig:
    """What is asked for, checked as far as it can be before a model is loaded."""
    from mmcompress.registry import METHODS
    from mmcompress.spec import CompressionConfig

    config = CompressionConfig.create(method, keep=parse_keep(keep), positions=typing.cast(Any, positions))
    spec = config.methods[0]
    METHODS.build(spec.name, spec.options)
    if spec.keep is None:
        raise SpecError(f"how much of the image should {spec.name} keep? Add --keep 0.25 or --keep 36.")
    return config


def _prompt(model: Any, processor: Any, pictures: list[Image], question: str) -> Any:
    """The model's inputs for one question about `pictures`, in its own chat format."""
    if not processor.chat_template:
        raise UnsupportedError("the model's processor has no chat template, so its prompt format is not known.")
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    try:
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    except ValueError as error:  # a question with an image placeholder in it, for one
        raise InputError(f"the model's processor cannot encode this question: {error}") from error
    return inputs.to(model.device, model.dtype)
