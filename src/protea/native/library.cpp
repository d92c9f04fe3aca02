// The interface of the native library. It is compiled for every processor of the platform.

#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

// The version of this interface, which protea/native/__init__.py expects.
EXPORT int protea_version() { return 1; }

// The instruction set in use.
EXPORT const char* protea_instruction_set() { return "baseline"; }

// Uses an instruction set instead of the best; returns 1 if the processor or the library lacks it.
EXPORT int protea_use(const char* name) { return strcmp(name, "baseline") != 0; }
