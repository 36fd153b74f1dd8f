"""How bytes of ranks on processors meet: the store, and collectives in shared memory."""
