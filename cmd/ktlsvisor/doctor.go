package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// doctorReport is the answer of `doctor --json`; fields may be added, none renamed.
type doctorReport struct {
	Version string             `json:"version"`
	Kernel  *ktls.Capabilities `json:"kernel"`
	Layer   string             `json:"layer"`   // what --offload auto takes here for TLS 1.3 with AES-128-GCM
	Choices []ktls.Choice      `json:"choices"` // what --offload auto takes for every version and suite
	Ranges  []ktls.KernelRange `json:"known_kernel_ranges"`
	Limits  limitsReport       `json:"limits"`
	Admin   adminReport        `json:"admin"`
	Advice  []string           `json:"advice"`
}

type limitsReport struct {
	NoFile      uint64 `json:"nofile"`       // hard limit of this user's processes
	MaxSessions uint64 `json:"max_sessions"` // about how many sessions that allows
}

type adminReport struct {
	Path    string `json:"path"`
	Running bool   `json:"running"`
	Error   string `json:"error,omitempty"`
}

func (a *app) doctorCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what this machine can do for TLS sessions, and what to do about the rest",
		Long: `Ask the kernel, by trying, which TLS versions and ciphers it can take over, and look
at the limits that matter. Nothing is changed, nothing needs root.

Exit code 0: ktlsvisor works here, if only with the software layer.`,
		Example: `  ktlsvisor doctor
  ktlsvisor doctor --json | jq .kernel.ktls`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rep := a.diagnose(cmd)
			if asJSON {
				return printJSON(a.out, rep)
			}
			printDoctor(a.out, rep)
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "answer in JSON")
	return cmd
}

// fdsPerSession: the keeper holds a session's socket, the worker has it, and the
// supervisor has it while it handshakes; each process has a limit of its own, so
// the busiest of them counts, with a reserve for everything else.
const (
	fdsPerSession = 1
	fdReserve     = 512
)

func (a *app) diagnose(cmd *cobra.Command) doctorReport {
	rep := doctorReport{Version: buildVersion().Version, Kernel: ktls.Probe(), Layer: "software", Advice: []string{}}
	if ok, _ := rep.Kernel.Supports(tls.VersionTLS13, tls.TLS_AES_128_GCM_SHA256); ok {
		rep.Layer = "kernel"
	}
	rep.Choices, rep.Ranges = rep.Kernel.Choices(), rep.Kernel.Ranges()
	seen := make(map[string]bool)
	for _, c := range rep.Kernel.Checks {
		if c.Status == ktls.StatusUnsupported && c.Remedy != "" && !seen[c.Remedy] {
			seen[c.Remedy] = true
			rep.Advice = append(rep.Advice, c.Reason+": "+c.Remedy)
		}
	}
	if n, err := sys.HardRlimitNofile(); err == nil {
		rep.Limits.NoFile = n
		if n > fdReserve {
			rep.Limits.MaxSessions = (n - fdReserve) / fdsPerSession
		}
		if n < 65536 {
			rep.Advice = append(rep.Advice, fmt.Sprintf("%d open files allow about %d sessions: raise the hard limit (ulimit -Hn, LimitNOFILE= in systemd)", n, rep.Limits.MaxSessions))
		}
	}
	c := a.client()
	rep.Admin.Path = c.Path()
	if _, err := c.Status(cmd.Context()); err != nil {
		rep.Admin.Error = err.Error()
	} else {
		rep.Admin.Running = true
	}
	return rep
}

func printDoctor(w io.Writer, rep doctorReport) {
	layer := "the software layer: sessions survive upgrades, and a crash of the supervisor, but not kill -9 of their worker"
	if rep.Layer == "kernel" {
		layer = "the kernel layer: sessions survive upgrades and crashes of every process"
	}
	running := "nothing runs at " + rep.Admin.Path
	if rep.Admin.Running {
		running = "a supervisor answers at " + rep.Admin.Path
	}
	table(w, [][]string{
		{"ktlsvisor", rep.Version},
		{"kernel", rep.Kernel.Release},
		{"--offload auto", layer},
		{"open files", fmt.Sprintf("%d, enough for about %d sessions", rep.Limits.NoFile, rep.Limits.MaxSessions)},
		{"admin socket", running},
	})
	fmt.Fprintln(w)
	table(w, rep.Kernel.ChoiceTable())
	fmt.Fprintln(w)
	table(w, kernelTable(rep.Kernel))
	fmt.Fprintln(w)
	table(w, rangeTable(rep))
	if len(rep.Advice) > 0 {
		fmt.Fprintln(w, "\nWhat you can do:")
		for _, s := range rep.Advice {
			fmt.Fprintln(w, "  "+clean(s))
		}
	}
}

// rangeTable says which kernels are known for what.
func rangeTable(rep doctorReport) [][]string {
	rows := [][]string{{"KERNELS BEFORE", "THIS ONE", "KNOWN FOR", "WHAT IS DONE"}}
	for _, r := range rep.Ranges {
		here := "no"
		if r.Applies {
			here = "yes"
		}
		rows = append(rows, []string{r.Before, here, r.What, r.Then})
	}
	return rows
}

// kernelTable has one row for each version and cipher, and for each other check;
// without a kernel that does TLS at all there is nothing to say about ciphers.
func kernelTable(caps *ktls.Capabilities) [][]string {
	rows := [][]string{{"CHECK", "SEND", "RECEIVE", "WHY NOT"}}
	at := make(map[string]int)
	for _, c := range caps.Checks {
		if c.Feature == ktls.FeatureOffload && noModule(caps) {
			continue
		}
		name := c.Feature
		if c.Version != "" {
			name = strings.TrimSpace(name + " " + c.Version)
		}
		if c.Suite != "" {
			name += " " + c.Suite
		}
		i, ok := at[name]
		if !ok {
			i = len(rows)
			at[name] = i
			rows = append(rows, []string{name, "-", "-", ""})
		}
		word := map[ktls.Status]string{ktls.StatusSupported: "yes", ktls.StatusUnsupported: "no", ktls.StatusUnknown: "unknown"}[c.Status]
		if c.Direction != ktls.DirectionReceive {
			rows[i][1] = word
		}
		if c.Direction != ktls.DirectionSend {
			rows[i][2] = word
		}
		if c.Reason != "" && !strings.Contains(rows[i][3], c.Reason) {
			if rows[i][3] != "" {
				rows[i][3] += "; "
			}
			rows[i][3] += c.Reason
		}
	}
	return rows
}

func noModule(caps *ktls.Capabilities) bool {
	for _, c := range caps.Checks {
		if c.Feature == ktls.FeatureModule {
			return c.Status == ktls.StatusUnsupported
		}
	}
	return false
}
