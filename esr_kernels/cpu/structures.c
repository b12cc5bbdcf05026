/* Constants that structures.py reads when the library is loaded. */
#include "structures.h"

#define SIZE(name) const int64_t size_of_##name = sizeof(struct name);
SIZE(transform)
SIZE(row_normalizers)
SIZE(row_pass)
SIZE(cache)
SIZE(attention)
SIZE(tile_logsumexp)
