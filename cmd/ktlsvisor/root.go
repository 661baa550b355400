package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
)

// app is one run of the program.
type app struct {
	out, err io.Writer // the answer; logs, progress and errors
	adminArg string    // --admin
	ran      bool      // a command's own code was reached
	current  *cobra.Command
}

func (a *app) client() *admin.Client { return admin.Dial(admin.Path(a.adminArg)) }

func (a *app) helpHint() string {
	if a.current != nil {
		return a.current.CommandPath() + " --help"
	}
	return "ktlsvisor --help"
}

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "ktlsvisor",
		Short: "Keep TLS connections open while the programs that serve them come and go",
		Long: `ktlsvisor terminates TLS and hands established connections to your worker
processes. A connection stays open while its worker is upgraded, killed or
replaced, and while ktlsvisor itself is.

` + exitCodeDoc,
		Example: `  ktlsvisor demo
  ktlsvisor run --listen :8443 --self-signed -- ./worker
  ktlsvisor upgrade
  ktlsvisor status`,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cmd.SetOut(a.err)
			_ = cmd.Help()
			return quietly(exitUsage)
		},
	}
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.PersistentFlags().StringVar(&a.adminArg, "admin", "", `admin socket (default $KTLSVISOR_ADMIN, else
$XDG_RUNTIME_DIR/ktlsvisor.sock, else /run/ktlsvisor.sock)`)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		a.current = cmd
		return err
	})
	root.AddCommand(
		a.runCommand(),
		a.upgradeCommand(),
		a.statusCommand(),
		a.sessionsCommand(),
		a.rekeyCommand(),
		a.scaleCommand(),
		a.drainCommand(),
		a.rebalanceCommand(),
		a.stopCommand(),
		a.checkCommand(),
		a.doctorCommand(),
		a.demoCommand(),
		a.versionCommand(),
		a.superviseCommand(),
		a.echoWorkerCommand(),
	)
	root.SetHelpCommand(helpCommand())
	root.InitDefaultCompletionCmd("completion") // the argument only has to be one
	for _, c := range root.Commands() {
		if c.Name() == "completion" {
			requireSubcommand(c)
		}
	}
	a.mark(root)
	return root
}

// mark notes for every command that its arguments were right and it runs.
func (a *app) mark(cmd *cobra.Command) {
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			a.current = cmd
			return check(cmd, args)
		}
	}
	if run := cmd.RunE; run != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			a.ran, a.current = true, cmd
			return run(cmd, args)
		}
	}
	for _, sub := range cmd.Commands() {
		a.mark(sub)
	}
}

// requireSubcommand makes a command that only groups others refuse to do nothing;
// cobra would print its help and exit with 0, whatever was asked for.
func requireSubcommand(cmd *cobra.Command) {
	var names []string
	for _, c := range cmd.Commands() {
		names = append(names, c.Name())
	}
	cmd.Args = nil
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return usagef("%s needs one of: %s", cmd.CommandPath(), strings.Join(names, ", "))
	}
}

// helpCommand is cobra's, but an unknown topic is an error.
func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Say what a command does",
		RunE: func(cmd *cobra.Command, args []string) error {
			topic, rest, err := cmd.Root().Find(args)
			if err != nil || topic == nil || len(rest) > 0 {
				return usagef("there is no help for %q", strings.Join(args, " "))
			}
			topic.InitDefaultHelpFlag()
			return topic.Help()
		},
	}
}

// noArgs is cobra.NoArgs in words for people.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%s takes no argument, but there is %q", cmd.CommandPath(), args[0])
	}
	return nil
}
