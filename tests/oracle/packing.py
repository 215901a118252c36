"""Documents cut into rows, token by token."""


def rows(documents: list[list[int]], sequence_length: int, pad: int) -> list[dict[str, list[int]]]:
    """Each row's tokens, targets, positions, segments and weights; the last row is padded."""
    stream = [(token, number) for number, document in enumerate(documents) for token in document]
    packed = []
    for begin in range(0, len(stream) - 1, sequence_length):
        row: dict[str, list[int]] = {"tokens": [], "targets": [], "positions": [], "segments": [], "weights": []}
        segment, position, before = 0, 0, None
        for place in range(begin, begin + sequence_length):
            inside = place < len(stream)
            token, document = stream[place] if inside else (pad, None)
            target, next_document = stream[place + 1] if place + 1 < len(stream) else (pad, None)
            if inside and document != before:
                segment, position, before = segment + 1, 0, document
            row["tokens"].append(token)
            row["targets"].append(target)
            row["segments"].append(segment if inside else 0)
            row["positions"].append(position)
            row["weights"].append(int(inside and document == next_document))
            position += 1
        packed.append(row)
    return packed
