// Functions that Python calls.
#pragma once

#define PEFTKERN_EXPORT extern "C" __attribute__((visibility("default")))
