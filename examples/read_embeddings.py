"""Read the files that ``protea embed proteins.fasta -o proteins.parquet -r proteins.h5`` writes.

Usage: python read_embeddings.py proteins.parquet proteins.h5
"""

import sys

import h5py
import numpy as np
import pyarrow.parquet as pq

# One vector per sequence: a Parquet table, which pandas.read_parquet and polars.read_parquet can also open.
table = pq.read_table(sys.argv[1])
vectors = np.stack(table["embedding"].to_numpy())
print(f"{sys.argv[1]}: columns {table.column_names}, embeddings {vectors.shape} {vectors.dtype}")

# One vector per residue: HDF5, one dataset per record.
with h5py.File(sys.argv[2]) as file:
    for name in table["id"].to_pylist()[:3]:
        residues = file[name.replace("/", "%2F")]
        print(f"{sys.argv[2]}: {name} has {residues.attrs['length']} residues, array {residues.shape}")
