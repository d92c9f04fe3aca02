"""Find the most similar proteins by mean embedding, and by the frequencies of amino acids alone.

Usage: python neighbours.py proteins.fasta OUT.parquet    (after ``protea embed proteins.fasta -o OUT.parquet``)
"""

import sys

import numpy as np
import pyarrow.parquet as pq

from protea.fasta import read_fasta

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def nearest(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row the index of its nearest neighbour, and the cosine similarity of the two."""
    # All embeddings have a large part in common; subtracting the mean leaves the differences.
    vectors = vectors - vectors.mean(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    return similarity.argmax(axis=1), similarity.max(axis=1)


records = list(read_fasta([sys.argv[1]]))
table = pq.read_table(sys.argv[2])
assert table["id"].to_pylist() == [record.id for record in records]
names, families = zip(*(record.description.split(" family=") for record in records), strict=True)

embeddings = np.stack(table["embedding"].to_numpy())
composition = np.array([[r.sequence.count(letter) / len(r.sequence) for letter in LETTERS] for r in records])

related = [i for i, family in enumerate(families) if families.count(family) > 1]
for i, (j, similarity) in enumerate(zip(*nearest(embeddings), strict=True)):
    if i in related:
        mark = "=" if families[i] == families[j] else " "
        print(f"{names[i][:48]:<48} {mark} {names[j][:48]:<48} {similarity:.2f}")

by_model, by_composition = (
    sum(families[i] == families[neighbours[i]] for i in related)
    for neighbours, _ in (nearest(embeddings), nearest(composition))
)
chance = np.mean([(families.count(families[i]) - 1) / (len(families) - 1) for i in related])
print(f"\nnearest neighbour in the same family (=): {by_model} of {len(related)} proteins in families of several")
print(f"by the frequencies of amino acids alone: {by_composition}; by chance {chance:.0%}")
