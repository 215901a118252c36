"""Parameters as matrices, for optimizers that look at rows and columns: one for each layer and each expert."""

from dataclasses import dataclass

from moe.model.parameter import summed_axes


@dataclass(frozen=True)
class MatrixAxes:
    """Axes of a parameter, counted from the end; those in front of them number matrices.

    rows: what a product with the parameter sums over. columns: what it puts out; of a vector none.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        return bool(self.rows and self.columns)


def matrix_axes(axes: str) -> MatrixAxes:
    """Of a parameter with these letters: D are the rows of w_EDF and w_DNH, whose heads are columns together; F and NH
    those of w_EFD and w_NHD, V those of w_VD."""
    own = axes.removeprefix("L")
    own = own.removeprefix("E") if len(own) > 2 else own
    rows = summed_axes(own) if len(own) > 1 else own
    places = [(letter in rows, place - len(own)) for place, letter in enumerate(own)]
    return MatrixAxes(tuple(place for row, place in places if row), tuple(place for row, place in places if not row))
