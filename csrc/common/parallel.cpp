#include "common/parallel.h"

namespace fastmoe_route {

ThreadPool thread_pool{[](int64_t count, int64_t, ThreadPool::Body body, void* context) { body(0, count, context); },
                       [] { return 1; }};

}  // namespace fastmoe_route
