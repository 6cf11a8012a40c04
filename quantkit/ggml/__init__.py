"""Types of ggml, its own code for them, and formats that read and write their codes.

types          QuantType: names, block sizes, bits per weight
native         libggml, by ctypes: quantize, dequantize, importances
formats        a class a type: grid and codes out of packed rows, and other codes in
grids_cuda     the same grids on a GPU
searches_cuda  its searches for scales
rounding       to nearest on a GPU, where nothing is searched
"""
