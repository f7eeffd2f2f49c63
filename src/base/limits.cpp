// >>base
// What the process has, which may be less than what the machine has: CPUs by its affinity mask and
// quota, memory by the limits of its container.
#include "prologue.hpp"

#include "base/internal.hpp"
#include "base/system.hpp"
#include "base/text.hpp"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- Control groups of Linux -----------------------------------------------------------------
//
// /proc/self/cgroup says for each hierarchy where in it the process is, /proc/self/mountinfo where
// hierarchies are mounted, each perhaps from some group on only (a container sees its own as the
// root). A limit of any group between the two holds. Version 1 has a hierarchy for each controller or
// some of them together, version 2 one for all; both may be there, each with some controllers.

namespace {

constexpr uint64_t kMostListBytes = 4 << 20;

// The next piece of *text before `separator`, which is taken off; all of it where there is none.
std::string_view take_until(std::string_view* text, char separator) {
    const size_t end = std::min(text->find(separator), text->size());
    const std::string_view piece = text->substr(0, end);
    text->remove_prefix(std::min(end + 1, text->size()));
    return piece;
}

bool list_has(std::string_view list, std::string_view wanted) {
    while (!list.empty())
        if (take_until(&list, ',') == wanted) return true;
    return false;
}

// mountinfo writes space, tab, newline and backslash in octal.
std::string unescaped(std::string_view text) {
    std::string out;
    for (size_t i = 0; i < text.size(); ++i) {
        const auto octal = [&](size_t at) { return text[at] >= '0' && text[at] <= '7'; };
        if (text[i] == '\\' && text.size() - i > 3 && octal(i + 1) && octal(i + 2) &&
            octal(i + 3)) {
            out += static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 +
                                     (text[i + 3] - '0'));
            i += 3;
        } else {
            out += text[i];
        }
    }
    return out;
}

// A whole number above 0; else ("max", -1, nothing, garbage) UINT64_MAX: no limit.
uint64_t limit_of(std::string_view text) {
    text = trim(text);
    uint64_t value = 0;
    for (const char c : text) {
        if (c < '0' || c > '9') return UINT64_MAX;
        if (mul_overflows(value, 10, &value) ||
            add_overflows(value, static_cast<uint64_t>(c - '0'), &value))
            return UINT64_MAX;
    }
    return value ? value : UINT64_MAX;
}

// The first line of a file of a group; nothing where it cannot be read.
std::string first_line(const std::string& path) {
    auto text = read_file(path, 4096);
    if (!text) return {};
    text->resize(std::min(text->find('\n'), text->size()));
    return std::move(*text);
}

double cpus_of(uint64_t quota_us, uint64_t period_us) {
    if (quota_us == UINT64_MAX || period_us == UINT64_MAX) return kNoCpuLimit;
    return static_cast<double>(quota_us) / static_cast<double>(period_us);
}

void read_group(const std::string& group, bool version_2, ProcessLimits* out) {
    const auto file = [&](const char* name) { return first_line(group + "/" + name); };
    if (version_2) {
        const std::string line = file("cpu.max");
        std::string_view text = line;
        const std::string_view quota = take_until(&text, ' ');
        out->cpus = std::min(out->cpus, cpus_of(limit_of(quota), limit_of(text)));
        for (const char* name : {"memory.max", "memory.high"})
            out->memory = std::min(out->memory, limit_of(file(name)));
        return;
    }
    out->cpus = std::min(out->cpus, cpus_of(limit_of(file("cpu.cfs_quota_us")),
                                            limit_of(file("cpu.cfs_period_us"))));
    out->memory = std::min(out->memory, limit_of(file("memory.limit_in_bytes")));
}

struct CgroupMount {
    bool version_2;
    std::string root, point;  // where in the hierarchy what is seen begins; where it is seen
    std::string options;      // of version 1: its controllers
};

std::vector<CgroupMount> read_mounts(std::string_view list) {
    std::vector<CgroupMount> out;
    while (!list.empty()) {
        std::string_view line = take_until(&list, '\n');
        const size_t dash = std::min(line.find(" - "), line.size());
        std::string_view file_system = line.substr(std::min(dash + 3, line.size()));
        const std::string_view type = take_until(&file_system, ' ');
        if (type != "cgroup" && type != "cgroup2") continue;
        take_until(&file_system, ' ');
        for (int field = 0; field < 3; ++field) take_until(&line, ' ');
        const std::string_view root = take_until(&line, ' '), point = take_until(&line, ' ');
        out.push_back({type == "cgroup2", unescaped(root), unescaped(point),
                       std::string(take_until(&file_system, ' '))});
    }
    return out;
}

// Where `group` lies below `root`: "" or "/a/b". False: nowhere.
bool is_below(const std::string& group, std::string root, std::string* below) {
    while (!root.empty() && root.back() == '/') root.pop_back();
    if (group.compare(0, root.size(), root) != 0) return false;
    *below = group.substr(root.size());
    if (*below == "/") below->clear();
    return (below->empty() || below->front() == '/') && (*below + "/").find("/../") == SIZE_MAX;
}

// The limits of `below` a mount point and of every group up to the mount point itself.
void read_groups(const std::string& point, std::string below, bool version_2, ProcessLimits* out) {
    for (;; below.resize(below.rfind('/'))) {
        read_group(point + below, version_2, out);
        if (below.empty()) return;
    }
}

// A hierarchy that the process is in. Where it sees none of its groups (of another container, of
// outside its namespace) the mount point is its own or one above it.
void read_hierarchy(const std::string& root, const std::vector<CgroupMount>& mounts,
                    std::string_view controllers, const std::string& group, ProcessLimits* out) {
    const bool version_2 = controllers.empty();
    bool found = false;
    for (const bool is_last_resort : {false, true}) {
        for (const CgroupMount& mount : mounts) {
            const bool holds = version_2
                                   ? mount.version_2
                                   : !mount.version_2 && ((list_has(controllers, "cpu") &&
                                                           list_has(mount.options, "cpu")) ||
                                                          (list_has(controllers, "memory") &&
                                                           list_has(mount.options, "memory")));
            std::string below;
            if (!holds) continue;
            if (is_below(group, mount.root, &below)) found = true;
            else if (is_last_resort) below.clear();
            else continue;
            read_groups(root + mount.point, below, version_2, out);
        }
        if (found) return;
    }
}

}  // namespace

ProcessLimits read_cgroup_limits(const std::string& root) {
    ProcessLimits out;
    const auto groups = read_file(root + "/proc/self/cgroup", kMostListBytes),
               mounted = read_file(root + "/proc/self/mountinfo", kMostListBytes);
    if (!groups || !mounted) return out;
    const std::vector<CgroupMount> mounts = read_mounts(*mounted);
    for (std::string_view list = *groups; !list.empty();) {
        std::string_view line = take_until(&list, '\n');
        take_until(&line, ':');
        const std::string_view controllers = take_until(&line, ':');
        if (!line.empty()) read_hierarchy(root, mounts, controllers, std::string(line), &out);
    }
    return out;
}

// ---- Limits of any system --------------------------------------------------------------------

namespace {

ProcessLimits read_process_limits() {
    ProcessLimits out;
#if defined(__linux__)
    out = read_cgroup_limits("");
#elif defined(_WIN32)
    JOBOBJECT_CPU_RATE_CONTROL_INFORMATION rate{};
    constexpr DWORD capped = JOB_OBJECT_CPU_RATE_CONTROL_ENABLE |
                             JOB_OBJECT_CPU_RATE_CONTROL_HARD_CAP;
    SYSTEM_INFO system{};
    GetSystemInfo(&system);
    if (QueryInformationJobObject(nullptr, JobObjectCpuRateControlInformation, &rate, sizeof rate,
                                  nullptr) &&
        (rate.ControlFlags & capped) == capped && rate.CpuRate)  // of 10,000: all CPUs
        out.cpus = rate.CpuRate * 1e-4 * system.dwNumberOfProcessors;
    JOBOBJECT_EXTENDED_LIMIT_INFORMATION job{};
    if (QueryInformationJobObject(nullptr, JobObjectExtendedLimitInformation, &job, sizeof job,
                                  nullptr)) {
        const DWORD flags = job.BasicLimitInformation.LimitFlags;
        if (flags & JOB_OBJECT_LIMIT_PROCESS_MEMORY) out.memory = job.ProcessMemoryLimit;
        if (flags & JOB_OBJECT_LIMIT_JOB_MEMORY)
            out.memory = std::min<uint64_t>(out.memory, job.JobMemoryLimit);
    }
#endif
    return out;
}

uint64_t physical_memory() {
#if defined(_WIN32)
    MEMORYSTATUSEX status{};
    status.dwLength = sizeof status;
    return GlobalMemoryStatusEx(&status) ? status.ullTotalPhys : UINT64_MAX;
#elif defined(__APPLE__)
    uint64_t bytes = 0;
    size_t size = sizeof bytes;
    return sysctlbyname("hw.memsize", &bytes, &size, nullptr, 0) == 0 ? bytes : UINT64_MAX;
#elif defined(_SC_PHYS_PAGES)
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return pages > 0 && page > 0 ? uint64_t(pages) * uint64_t(page) : UINT64_MAX;
#else
    return UINT64_MAX;
#endif
}

// Half of what pointers reach, or `ulimit -v` allows: a file is mapped beside its packed weights.
uint64_t address_space() {
    uint64_t all = SIZE_MAX;
#if !defined(_WIN32)
    rlimit limit{};
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
        all = std::min(all, static_cast<uint64_t>(limit.rlim_cur));
#endif
    return all / 2;
}

#if defined(__linux__)
// The CPUs of the affinity mask, however many the kernel was built for.
std::vector<int> allowed_cpus() {
    std::vector<int> out;
    std::vector<unsigned long> mask(1024 / CHAR_BIT / sizeof(unsigned long));
    constexpr size_t word_bits = CHAR_BIT * sizeof(unsigned long);
    while (sched_getaffinity(0, mask.size() * sizeof mask[0],
                             reinterpret_cast<cpu_set_t*>(mask.data())) != 0) {
        if (errno != EINVAL || mask.size() * word_bits > (1 << 20)) return out;
        mask.resize(mask.size() * 2);
    }
    for (size_t cpu = 0; cpu < mask.size() * word_bits; ++cpu)
        if (mask[cpu / word_bits] >> cpu % word_bits & 1) out.push_back(int(cpu));
    return out;
}
#endif

int cores_of_mask() {
    int cores = 0;
#if defined(_WIN32)
    DWORD_PTR allowed = 0, system = 0;
    GetProcessAffinityMask(GetCurrentProcess(), &allowed, &system);
    DWORD bytes = 0;
    GetLogicalProcessorInformation(nullptr, &bytes);
    std::vector<SYSTEM_LOGICAL_PROCESSOR_INFORMATION> list(bytes / sizeof list[0] + 1);
    bytes = DWORD(list.size() * sizeof list[0]);
    if (!GetLogicalProcessorInformation(list.data(), &bytes)) bytes = 0;
    list.resize(bytes / sizeof list[0]);
    for (const auto& entry : list)
        cores += entry.Relationship == RelationProcessorCore && (entry.ProcessorMask & allowed);
#elif defined(__APPLE__)
    size_t size = sizeof cores;
    if (sysctlbyname("hw.perflevel0.physicalcpu", &cores, &size, nullptr, 0) != 0)
        sysctlbyname("hw.physicalcpu", &cores, &size, nullptr, 0);
#elif defined(__linux__)
    // Logical CPUs of one core list the same siblings.
    std::vector<std::string> seen;
    for (const int cpu : allowed_cpus()) {
        auto siblings = read_file(
            format("/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu), 4096);
        seen.push_back(siblings ? std::move(*siblings) : format("%d", cpu));
    }
    std::sort(seen.begin(), seen.end());
    cores = int(std::unique(seen.begin(), seen.end()) - seen.begin());
#endif
#if !defined(_WIN32)
    if (cores < 1) cores = int(sysconf(_SC_NPROCESSORS_ONLN));
#endif
    return cores;
}

}  // namespace

// Rounded down. A thread more than the quota pays for runs it out before its period ends, and then
// all threads stand still until the next, tens of milliseconds: in the middle of a stage, where the
// others wait, and of a token.
int ProcessLimits::cores(int of_mask) const {
    return static_cast<int>(std::max(std::min(cpus, static_cast<double>(of_mask)), 1.0));
}

uint64_t usable_memory() {
    return std::min({physical_memory(), read_process_limits().memory, address_space()});
}

}  // namespace detail

int physical_cores() { return detail::read_process_limits().cores(detail::cores_of_mask()); }

}  // namespace v1
}  // namespace valar
