raise ImportError("its compiled part needs a GPU's driver")
