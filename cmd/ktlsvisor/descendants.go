package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/pidfd"
)

// killDescendants kills every process under this one, which is their subreaper: no
// descendant can escape by losing its parent. It returns how many it killed.
func killDescendants() int {
	killed := make(map[int]bool)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		found := false
		for _, pid := range descendants(os.Getpid()) {
			if killed[pid] {
				continue
			}
			p, err := pidfd.Open(pid)
			if err != nil {
				continue
			}
			// The pid may have changed hands between the look and the open; a
			// descendant that still is one now is the process that p names.
			if isDescendant(pid, os.Getpid()) {
				if p.Signal(syscall.SIGKILL) == nil {
					killed[pid], found = true, true
					_ = p.Wait(ctx)
				}
			}
			_ = p.Close()
		}
		if !found {
			break
		}
	}
	return len(killed)
}

// descendants lists all live processes under root.
func descendants(root int) []int {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil
	}
	var list []int
	for _, d := range dirs {
		pid, err := strconv.Atoi(filepath.Base(d))
		if err == nil && pid != root && isDescendant(pid, root) {
			list = append(list, pid)
		}
	}
	return list
}

func isDescendant(pid, root int) bool {
	// A chain of parents is never this long; the bound is against a tree that
	// changes under the walk.
	for range 64 {
		parent, alive := parentOf(pid)
		switch {
		case !alive || parent <= 0:
			return false
		case parent == root:
			return true
		}
		pid = parent
	}
	return false
}

// parentOf reads proc_pid_stat(5); a zombie is not alive.
func parentOf(pid int) (parent int, alive bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, false
	}
	// The name in parentheses may contain anything, so look behind the last one.
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, false
	}
	f := bytes.Fields(b[i+1:])
	if len(f) < 2 || f[0][0] == 'Z' || f[0][0] == 'X' {
		return 0, false
	}
	parent, err = strconv.Atoi(string(f[1]))
	return parent, err == nil
}
