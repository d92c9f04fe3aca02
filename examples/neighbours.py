"""Which proteins are alike? Nearest neighbours by mean embedding, and by the frequencies of amino acids alone.

Usage: python neighbours.py proteins.fasta OUT.parquet    (of ``protea embed proteins.fasta -o OUT.parquet``)
"""

import sys

import numpy as np
import pyarrow.parquet as pq

from protea.fasta import read_fasta


def nearest(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the nearest other one, and how alike the two are."""
    # All proteins have much in common; what tells them apart is how each differs from the mean of all.
    vectors = vectors - vectors.mean(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    alike = vectors @ vectors.T
    np.fill_diagonal(alike, -np.inf)
    return alike.argmax(axis=1), alike.max(axis=1)


records = list(read_fasta([sys.argv[1]]))
table = pq.read_table(sys.argv[2])
assert table["id"].to_pylist() == [record.id for record in records]
names, families = zip(*(record.description.split(" family=") for record in records), strict=True)

embeddings = np.stack(table["embedding"].to_numpy())
composition = np.array([[r.sequence.count(one) / len(r.sequence) for one in "ACDEFGHIKLMNPQRSTVWY"] for r in records])

related = [i for i, family in enumerate(families) if families.count(family) > 1]
for i, (j, alike) in enumerate(zip(*nearest(embeddings), strict=True)):
    if i in related:
        mark = "=" if families[i] == families[j] else " "
        print(f"{names[i][:48]:<48} {mark} {names[j][:48]:<48} {alike:.2f}")

by_model, by_composition = (
    sum(families[i] == families[found[i]] for i in related) for found, _ in (nearest(embeddings), nearest(composition))
)
chance = np.mean([(families.count(families[i]) - 1) / (len(families) - 1) for i in related])
print(f"\nnearest neighbour is of the same family (=): {by_model} of {len(related)} proteins that have one")
print(f"by the frequencies of amino acids alone: {by_composition}; by chance {chance:.0%}")
