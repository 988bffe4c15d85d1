"""Stage III: pairs with hard negatives.

python -m training.hard_negatives --config training/recipes/tiny-hard-negatives.yaml data_dir=DATA model=RUN2/final
output_dir=RUN3
"""

import os

from .contrastive import train
from .recipe import ContrastiveRecipe, RecipeError, command_line, load_recipe
from .run import exit_on_recipe_error


def main():
    arguments = command_line("Stage III: hard negatives.")
    recipe = load_recipe(ContrastiveRecipe, arguments.config, arguments.overrides)
    if recipe.num_negatives < 1:
        raise RecipeError(f"num_negatives={recipe.num_negatives}: stage III needs at least 1 (the paper has 15).")
    final = train(recipe, command="training.hard_negatives", resume=arguments.resume)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"stage III finished: {final}")


if __name__ == "__main__":
    exit_on_recipe_error(main)
