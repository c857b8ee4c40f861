// What each build of the CPU kernels offers. Their namespaces differ, so that no function of one
// build can stand in for that of another when they are linked.
#pragma once

namespace nas_transfer {

namespace portable {
int lanes();  // floats in a vector
}

#if defined(__x86_64__)
namespace avx2 {
int lanes();
}
namespace avx512 {
int lanes();
}
#endif

}  // namespace nas_transfer
