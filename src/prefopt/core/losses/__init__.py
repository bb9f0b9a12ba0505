"""Facts of every loss, without torch: the command line, the checks, the docs and the tests are derived from them."""
