"""The same picture with stock and with agent attention, side by side in one folder.

python examples/image.py                                    # the bundled model; needs no download
python examples/image.py "a photo of a lighthouse" --model stable-diffusion-v1-5/stable-diffusion-v1-5
"""

import argparse
from dataclasses import replace
from pathlib import Path

from reattend.pipelines import Recipe, generate, load


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("prompt", nargs="?", default="a blue car and a cat on sand")
    options.add_argument("--model", default="tiny-sd")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--out", type=Path, default=Path("out/example"))
    given = options.parse_args(argv)

    pipe = load(given.model)
    stock = Recipe(prompt=given.prompt, model=given.model, steps=given.steps, seed=1)
    agent = replace(stock, attention=({"name": "agent", "ratio": 0.4},))
    for name, recipe in (("stock", stock), ("agent", agent)):
        picture = generate(recipe, pipe=pipe)
        path, _ = picture.recipe.save(picture.image, given.out / f"{name}.png")
        print(path)


if __name__ == "__main__":
    main()
