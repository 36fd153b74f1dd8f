"""Importing this turns garbage collection off for the imports that follow.

They make a million objects and no garbage; collections take a quarter of their time.
"""

import gc

gc.disable()
