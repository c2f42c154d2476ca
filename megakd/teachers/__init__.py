"""Where a teacher's embeddings come from: a whole copy on each rank, a ZeRO-3 partition, a store; and how it is built."""
