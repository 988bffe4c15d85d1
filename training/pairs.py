"""Stage II: text pairs, from a backbone to an embedding model.

python -m training.pairs --config training/recipes/tiny-pairs.yaml data_dir=DATA model=RUN/final output_dir=RUN2
"""

import os

from .contrastive import train
from .recipe import ContrastiveRecipe, RecipeError, command_line, load_recipe
from .run import exit_on_recipe_error


def main():
    arguments = command_line("Stage II: text pairs.")
    recipe = load_recipe(ContrastiveRecipe, arguments.config, arguments.overrides)
    if recipe.num_negatives:
        raise RecipeError(f"num_negatives={recipe.num_negatives}: stage II has none; run training.hard_negatives.")
    final = train(recipe, command="training.pairs", resume=arguments.resume)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"stage II finished: {final}")


if __name__ == "__main__":
    exit_on_recipe_error(main)
