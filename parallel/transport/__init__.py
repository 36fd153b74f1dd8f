"""Transport between ranks on CPUs: the rendezvous, and a backend with shared memory."""
