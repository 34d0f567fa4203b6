"""What is told of a folder that is not what it was taken for."""

import pytest

from raecli.errors import InputError
from raecli.recipe.load import load_recipe
from raecli.store.manifest import read_manifest
from raecli.store.run_folder import prepare_run


def test_a_folder_that_is_no_cache_and_one_in_the_making_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="IMAGES OUT makes it"):
        read_manifest(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="again to finish it"):
        read_manifest(tmp_path)


def test_a_run_that_was_to_be_longer_is_told_why_it_cannot(tmp_path):
    prepare_run(tmp_path, load_recipe(None, "dith_s"), 1)
    (tmp_path / "final").mkdir()
    for override, said in (("duration=90 epochs", True), ("batch_size=7", False)):
        with pytest.raises(InputError, match="another recipe") as caught:
            prepare_run(tmp_path, load_recipe(None, "dith_s", [override]), 1)
        assert ("a longer run starts anew" in str(caught.value)) == said
