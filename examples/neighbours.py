"""Which proteins are alike? Nearest neighbours by mean embedding, from ``protea embed proteins.fasta -o OUT.parquet``.

Usage: python neighbours.py OUT.parquet
"""

import sys

import numpy as np
import pyarrow.parquet as pq

table = pq.read_table(sys.argv[1])
vectors = np.stack(table["embedding"].to_numpy())
names = [text.split(" family=")[0] for text in table["description"].to_pylist()]
families = [text.split(" family=")[1] for text in table["description"].to_pylist()]

# All proteins have much in common; what tells them apart is how each differs from the mean of all.
vectors -= vectors.mean(axis=0)
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
alike = vectors @ vectors.T
np.fill_diagonal(alike, -np.inf)
nearest = alike.argmax(axis=1)

found = wanted = 0
for i, j in enumerate(nearest):
    if families.count(families[i]) > 1:
        wanted += 1
        found += families[i] == families[j]
        mark = "=" if families[i] == families[j] else " "
        print(f"{names[i][:48]:<48} {mark} {names[j][:48]:<48} {alike[i, j]:.2f}")
chance = sum(families.count(one) - 1 for one in families if families.count(one) > 1) / wanted / (len(families) - 1)
print(f"\nnearest neighbour of the same family (=): {found} of {wanted} proteins that have one; by chance {chance:.0%}")
