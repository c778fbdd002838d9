"""What has been imported so far is left out of garbage collections from here on.

axolotl and accelerate collect several times in every run, and each time some 0.3 seconds went into looking at a million
objects of imported modules; in a forked process the look copies their pages, too.
"""

import gc

gc.collect()
gc.freeze()
