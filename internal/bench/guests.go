package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest"
)

// The part in guests is a test of this package, because tests are what guests run:
// TestKernelLayer and TestKernelMoves, which print each result in a line of its own. These variables tell
// it to measure properly, and what.
const (
	envGuest    = "KTLSVISOR_TEST_BENCH"
	envGuestRun = "KTLSVISOR_TEST_BENCH_RUN"

	resultMark = "BENCH RESULT "
)

// Guests measures the kernel layer on lines of kernels such as "7" and "6.12", those
// cases that match only. Every result has its guest's name already.
func Guests(ctx context.Context, root string, kernels []string, only *regexp.Regexp, commit string, say func(format string, args ...any)) (Report, error) {
	var r Report
	dir, err := vmtest.DefaultCacheDir()
	if err != nil {
		return r, err
	}
	for _, part := range []struct {
		test, cpu string
		match     func(only *regexp.Regexp) bool
	}{
		{"^TestKernelLayer$", "", func(only *regexp.Regexp) bool {
			return only.MatchString("idle-kernel") || slices.ContainsFunc(KernelCases(), func(c Case) bool { return only.MatchString(c.ID) })
		}},
		// A simple processor is emulated in less time, and there is nothing to encrypt.
		{"^TestKernelMoves$", "Westmere", func(only *regexp.Regexp) bool {
			return slices.ContainsFunc(GuestMoves(), func(m MoveOptions) bool { return only.MatchString(m.ID()) })
		}},
	} {
		if !part.match(only) {
			continue
		}
		boots, rerr := vmtest.Run(ctx, vmtest.Options{
			Root: root, Kernels: kernels, Packages: regexp.MustCompile("^internal/bench$"), Run: part.test,
			Env:   []string{envGuest + "=1", envGuestRun + "=" + only.String()},
			Cache: &vmtest.Cache{Dir: dir, Say: say}, Say: say,
			// 10,000 handshakes without KVM, and 100,000 sessions.
			BootLimit: 80 * time.Minute,
			TestLimit: 75 * time.Minute,
			CPU:       part.cpu,
			Memory:    6 << 10,
			Verbose:   true, // it takes long: what it has come to is shown meanwhile
		})
		err = errors.Join(err, rerr)
		for _, b := range boots {
			got, perr := fromGuest(b)
			if perr != nil {
				return r, fmt.Errorf("kernel %s: %w", b.Kernel, perr)
			}
			got.From(commit, b.Kernel)
			r.Add(got)
			if len(b.Problems) > 0 {
				err = errors.Join(err, fmt.Errorf("kernel %s: %s", b.Kernel, strings.Join(b.Problems, "; ")))
			}
		}
	}
	return r, err
}

func fromGuest(b *vmtest.BootResult) (r Report, err error) {
	for _, p := range b.Packages {
		for _, line := range p.Output {
			_, text, ok := strings.Cut(line, resultMark)
			if !ok {
				continue
			}
			var part Report
			if err := json.Unmarshal([]byte(text), &part); err != nil {
				return r, fmt.Errorf("a result cannot be read: %w", err)
			}
			r.Add(part)
		}
	}
	return r, nil
}

// guestLine is what the test in the guest prints.
func guestLine(r Report) (string, error) {
	b, err := json.Marshal(r)
	return resultMark + string(b), err
}
