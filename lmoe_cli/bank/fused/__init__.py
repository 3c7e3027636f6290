"""A blend in decoding on a CUDA device, in two launches for all modules that share an input.

    low = (A x) * gates        y_m = W_m x + bias_m + B_m low[start_m : start_m + R_m]

A handful of vectors reads every weight once, so time is bytes plus launches. With 3.3 TB/s and 2 to 3 us per launch in
a replayed graph (arithmetic, not a measurement), one layer of a 4B model in bfloat16 (width 2560, 32 heads of 128, 8
for keys, an MLP of 9728) with 3.6 MB of experts:

    group        MB of W   us by bytes   launches: base   A and B each   `behind`   `grouped`
    q, k, v         31.5           9.5                3              9          5           2
    o               21.0           6.4                1              3          3           2
    gate, up        99.6          30.2                2              6          4           2
    down            49.8          15.1                1              3          3           2
    all            201.9          61.2                7             21         15           8

The experts' own bytes cost 1.1 us. `behind` adds 8 launches, 16 to 24 us, a quarter to a third of the layer; `grouped`
adds one. So `grouped` is for matrices that these kernels can read, and `behind` for those whose product only the base
itself can take, as where it is quantised. The price of `grouped` is a kernel of ours in place of cuBLAS's for W x,
worth it while that reaches some eight tenths of the other's bandwidth.

What the base gives is handed from the first launch to the second in float32: the 8 bytes per output, written and read,
stay in the cache and are little beside the 2 d_in bytes of its row of W, and the sum is rounded once. `behind` starts
from what the base has rounded already.
"""
