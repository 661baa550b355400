//go:build fault

package fault

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Enabled says whether this program can be made to fail.
const Enabled = true

const (
	holdLimit  = 10 * time.Second
	delayTime  = 250 * time.Millisecond
	noFileTime = 400 * time.Millisecond
)

var errnos = map[string]syscall.Errno{
	"EMFILE": syscall.EMFILE, "ENFILE": syscall.ENFILE, "ETOOMANYREFS": syscall.ETOOMANYREFS,
	"ENOBUFS": syscall.ENOBUFS, "ENOMEM": syscall.ENOMEM, "EPIPE": syscall.EPIPE, "EBUSY": syscall.EBUSY,
}

// The folder and this process's role are read before main unsets anything.
var (
	dir  = os.Getenv("FAULT_DIR")
	role = roleOf(os.Args, os.Getenv("KTLSVISOR_FD") != "")
)

func roleOf(args []string, worker bool) string {
	name, _, _ := strings.Cut(filepath.Base(args[0]), ".")
	switch {
	case worker:
		return name
	case len(args) > 1 && args[1] == "run":
		return "keeper"
	case len(args) > 1 && args[1] == "supervise":
		if os.Getenv("TABLEFLIP_HAS_PARENT_7DIU3") != "" {
			return "successor"
		}
		return "supervisor"
	}
	return name
}

var (
	mu   sync.Mutex
	hits = map[int]int{} // by fault: how often this process has come to its step
)

// fired is the file of a fault that was carried out.
func fired(i int) string { return filepath.Join(dir, "fired-"+strconv.Itoa(i)) }

// Step is At for a step that cannot fail.
func Step(step string) { At(step) }

// At passes a step: what the plan has for it is done, or told.
func At(step string) Verdict {
	if dir == "" {
		return Verdict{}
	}
	mu.Lock()
	trace(step)
	i, action := due(step)
	mu.Unlock()
	if action == "" {
		return Verdict{}
	}
	return carryOut(i, action)
}

func trace(step string) {
	f, err := os.OpenFile(filepath.Join(dir, "trace"), os.O_WRONLY|os.O_APPEND|syscall.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer f.Close()
	_, _ = fmt.Fprintf(f, "%s %s\n", role, step)
}

// due finds the fault in force, and claims it if it is this process's turn.
func due(step string) (i int, action string) {
	b, err := os.ReadFile(filepath.Join(dir, "plan"))
	if err != nil {
		return 0, ""
	}
	for line := range strings.Lines(string(b)) {
		if _, err := os.Lstat(fired(i)); err == nil {
			i++
			continue
		}
		w := strings.Fields(line)
		if len(w) != 4 || w[0] != role || w[1] != step {
			return 0, ""
		}
		n, err := strconv.Atoi(w[2])
		if err != nil {
			return 0, ""
		}
		if hits[i]++; hits[i] < n {
			return 0, ""
		}
		f, err := os.OpenFile(fired(i), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return 0, "" // another process was faster
		}
		_, _ = fmt.Fprintf(f, "%d\n", os.Getpid())
		_ = f.Close()
		trace("FIRED")
		return i, w[3]
	}
	return 0, ""
}

func carryOut(i int, action string) Verdict {
	switch action {
	case Kill:
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case Stop:
		_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
	case Hold:
		for end := time.Now().Add(holdLimit); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if _, err := os.Lstat(filepath.Join(dir, "go-"+strconv.Itoa(i))); err == nil {
				break
			}
		}
	case Delay:
		time.Sleep(delayTime)
	case NoFile:
		noFile()
	case Drop:
		return Verdict{Drop: true}
	case Repeat:
		return Verdict{Repeat: true}
	case Close:
		return Verdict{Close: true}
	case Fill:
		return Verdict{Fill: true}
	}
	if name, ok := strings.CutPrefix(action, Fail); ok {
		return Verdict{Err: errnos[name]}
	}
	return Verdict{}
}

// noFile leaves this process without room for another descriptor for a while: the limit
// goes down to what is open, and what is free below it is taken.
func noFile() {
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
		return
	}
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	now := was
	now.Cur = 3
	for _, e := range list {
		if n, err := strconv.ParseUint(e.Name(), 10, 32); err == nil {
			now.Cur = max(now.Cur, n+1)
		}
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &now); err != nil {
		return
	}
	var taken []int
	for {
		fd, err := syscall.Open("/dev/null", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		if err != nil {
			break
		}
		taken = append(taken, fd)
	}
	time.AfterFunc(noFileTime, func() {
		_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was)
		for _, fd := range taken {
			_ = syscall.Close(fd)
		}
	})
}
