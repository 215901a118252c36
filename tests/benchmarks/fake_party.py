"""A party without a model, which is about what it was told."""

from benchmarks.rivals.party import joins
from benchmarks.rivals.protocol import serve

if __name__ == "__main__":
    told = joins()
    assert told is not None
    serve(lambda: (told, lambda: ({"step": 1.0}, None)))
