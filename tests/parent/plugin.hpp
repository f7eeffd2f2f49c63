#pragma once

extern "C" __attribute__((visibility("default"))) int answer(const char* model);
