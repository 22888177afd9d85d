// Compiles the file RF_KERNEL for the instruction set RF_ISA, whose features are RF_TARGET; see each_isa.h.
#define RF_PRAGMA(text) RF_PRAGMA_OF(text)  // with macros in it expanded
#define RF_PRAGMA_OF(text) _Pragma(#text)

#if defined(__clang__)
RF_PRAGMA(clang attribute push(__attribute__((target(RF_TARGET))), apply_to = function))
#else
RF_PRAGMA(GCC push_options)
RF_PRAGMA(GCC target(RF_TARGET))
#endif

#include RF_KERNEL

#if defined(__clang__)
RF_PRAGMA(clang attribute pop)
#else
RF_PRAGMA(GCC pop_options)
#endif

#undef RF_PRAGMA
#undef RF_PRAGMA_OF
#undef RF_ISA
#undef RF_VECTOR_BYTES
#undef RF_TARGET
