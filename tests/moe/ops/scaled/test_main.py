from moe.ops.scaled.__main__ import errors_of
from moe.ops.scaled.recipe import Recipe


def test_rows_far_from_the_others_harm_these_where_all_share_a_scale():
    # A step of int8 is 1/127 of the largest; normal numbers' root mean square is about a third of theirs.
    assert all(error < 0.015 for error in errors_of(Recipe("int8", "row"), "outlier rows"))
    assert errors_of(Recipe("int8", "tensor"), "outlier rows")[0] > 0.05
