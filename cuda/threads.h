// threads.h: threads of the library's own.
#pragma once
#include <pthread.h>
#include <signal.h>

#include <functional>
#include <thread>

namespace fkv {

// Starts a thread that leaves the process's signals to the host's own threads.
inline std::thread start_thread(std::function<void()> body) {
  sigset_t all, before;
  sigfillset(&all);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // a new thread inherits the mask
  struct Restore {
    const sigset_t& mask;
    ~Restore() { pthread_sigmask(SIG_SETMASK, &mask, nullptr); }
  } restore{before};
  return std::thread(std::move(body));
}

}  // namespace fkv
