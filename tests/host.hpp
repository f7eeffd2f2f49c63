// What a host may do to the process that it shares with the library, for tests.
#ifndef VALAR_TESTS_HOST_HPP
#define VALAR_TESTS_HOST_HPP

#if !defined(_WIN32)
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

/// While it lives a signal whose handler lets no system call start again comes every millisecond.
struct Interrupts {
    Interrupts() {
        struct sigaction action = {};
        action.sa_handler = [](int) {};
        sigaction(SIGALRM, &action, &before);
        set_timer(1000);
    }
    ~Interrupts() {
        set_timer(0);
        sigaction(SIGALRM, &before, nullptr);
    }
    Interrupts(const Interrupts&) = delete;
    static void set_timer(int us) {
        const itimerval timer = {{0, us}, {0, us}};
        setitimer(ITIMER_REAL, &timer, nullptr);
    }
    struct sigaction before = {};
};

/// While it lives no descriptor can be opened.
struct NoDescriptors {
    NoDescriptors() {
        getrlimit(RLIMIT_NOFILE, &before);
        rlimit none = before;
        none.rlim_cur = 0;
        setrlimit(RLIMIT_NOFILE, &none);
    }
    ~NoDescriptors() { setrlimit(RLIMIT_NOFILE, &before); }
    NoDescriptors(const NoDescriptors&) = delete;
    rlimit before = {};
};

/// Whether a child made by fork comes to the end of `work`, within ten seconds.
template <class Work>
bool ends_in_a_child(Work work) {
    const pid_t child = fork();
    if (child == 0) {
        alarm(10);
        work();
        _exit(0);
    }
    int status = 0;
    while (child > 0 && waitpid(child, &status, 0) < 0) {}
    return child > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}
#endif

#endif
