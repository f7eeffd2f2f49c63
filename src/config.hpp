// Macros and what every part assumes of the target.
#pragma once

#define VALAR_VERSION "0.1.0"

#ifndef VALAR_API
#define VALAR_API
#endif
#ifndef VALAR_ASSERT
#define VALAR_ASSERT(condition) ((void)0)
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "valar runs on little-endian machines only"
#endif
