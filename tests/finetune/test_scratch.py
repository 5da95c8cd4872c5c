"""`scratch` is tested with `FineTune`, of which it is a special case."""

from test_fine_tune import test_scratch_is_seeded_and_leaves_the_generator_alone  # noqa: F401
